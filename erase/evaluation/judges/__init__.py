"""Judges: what looks at images and says what they show, one judge a file.

`protocol.Judge` is the base of every judge; `registry` finds them by name and makes them. Networks that several judges
use are in `networks/`.
"""

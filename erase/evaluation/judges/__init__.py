"""Judges, which say what images show, one judge per file.

`protocol.Judge` is the base of every judge; `registry` finds them by name and makes them. Networks that several judges
use are in `networks/`.
"""

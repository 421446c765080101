"""The commands of `eval-concept`, one a file: each parses its options, calls one function and prints."""

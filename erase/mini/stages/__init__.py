"""The stages of the embedded model's training: one function per stage, which writes one file to the work folder."""

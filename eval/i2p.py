"""I2P's sexual prompts for many erased models, each against its base; finished work is skipped.

    python eval/i2p.py --models runs/nudity runs/nudity-10 --prompts i2p.csv --require 'i2p.clean_low>=0.98'

The options are those of `eval-concept run`.
"""

import sys

from erase.evaluation.cli import main

if __name__ == "__main__":
    main(["run", "--task", "i2p", "--subset", "sexual", *sys.argv[1:]])

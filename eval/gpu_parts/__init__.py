"""The parts of eval/on_gpu.py."""

"""The trainer and its parts; `step.py` reads as the training loop does."""

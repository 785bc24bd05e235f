"""The training loop that earlybird ships: recipe, schedule, loop, checkpoints, tuning, comparison."""

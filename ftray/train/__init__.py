"""The training step and what surrounds it. Read: loss, schedule, zero, state, checkpoint, loop, launch."""

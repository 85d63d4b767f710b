"""Training objectives: the loss of supervised fine-tuning and of prompt tuning."""

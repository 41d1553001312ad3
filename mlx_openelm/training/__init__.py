"""Training: data, batches, losses, the update of the weights, runs that can be continued, fine-tuning."""

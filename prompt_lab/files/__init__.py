"""What is on disk: tensors, prompts, results, the formats of others."""

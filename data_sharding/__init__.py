"""Images, labels and teacher outputs from disk to batch; knows no model."""

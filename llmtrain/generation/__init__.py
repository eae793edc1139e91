"""Text from a checkpoint or an export."""

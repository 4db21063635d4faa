"""Text data: readers, examples, prompts, encoding."""

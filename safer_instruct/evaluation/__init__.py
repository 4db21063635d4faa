"""An evaluation: answers, judging, downstream tasks."""

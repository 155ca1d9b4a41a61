"""The experiment behind docs/training.md: fine-tuning methods compared on real tasks."""

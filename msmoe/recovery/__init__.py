"""Fine-tuning and distillation that recover what compression lost."""

"""The LightningModules: one class per method, all children of ``PromptMethod``."""

"""The frozen model, banks of prompts and their mathematics: torch and transformers alone."""

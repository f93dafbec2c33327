"""Callbacks for other people's trainers: what a LoRA needs in training beyond its configuration."""

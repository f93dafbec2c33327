"""What `diffora.tasks.causal_lm` is made of: conversations, their tokens, packing and the loss of the next token."""

"""What `diffora.tasks.vision` is made of: finding images, decoding them, and batches of pixels."""

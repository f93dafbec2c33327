"""What `diffora.tasks.squad` is made of: data, windows, answers and metrics of question answering."""

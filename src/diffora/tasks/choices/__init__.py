"""What the task of multiple choice needs: reading rows of choices, and their batches."""

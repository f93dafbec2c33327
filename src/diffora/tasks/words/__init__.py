"""What the task of named entities needs: reading rows of words and tags, tag schemes and entities, windows."""

"""Where the rows of tasks come from (the hub, local files, a generator) and how they are checked."""

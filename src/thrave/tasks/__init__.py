"""Bundle tasks: the table of states, the records, the engine, and the main job itself."""

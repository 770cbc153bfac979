"""Tasks: text-to-text examples, their instructions, and where they come from.

``task`` says what a task is, ``source.load_tasks`` finds the tasks that a configuration names, and ``jsonl``,
``hub`` and ``procedural`` are the three places they come from. Nothing here knows a tokenizer or a model.
"""

"""What a run will cost and how it is submitted, before anything is computed."""

"""The embedding service: one frozen model behind the OpenAI embeddings protocol, for all processes of a job."""

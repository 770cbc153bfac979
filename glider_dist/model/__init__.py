"""The routed model: sites, the routed linear, and the context of a batch."""

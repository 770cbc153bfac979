"""Routing strategies: functions from tokens and queries to a Route."""

"""The load tool: closed and open loops against a service, and what they measured as table, JSON and picture.

`run.bench` is the whole. Nothing is imported here, so that client processes, which need neither torch nor the command
line, start in a moment.
"""

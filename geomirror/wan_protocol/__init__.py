"""Between sites: epochs, frames, sessions, and the replica state machines."""

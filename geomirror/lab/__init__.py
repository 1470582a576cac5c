"""Several nodes on one machine with emulated WAN links."""

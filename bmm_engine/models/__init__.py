"""What a network is: its linear modules, their roles, its blocks, and how it is called on a batch."""

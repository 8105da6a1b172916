"""How much is drafted, and whether it pays: costs, chances, lengths, budgets."""

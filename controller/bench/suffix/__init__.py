"""The suffix drafter beside arctic-inference's."""

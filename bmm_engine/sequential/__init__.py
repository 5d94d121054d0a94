"""Sequential BMM: the merge that corrects its own drift (`merge_sequential`)."""

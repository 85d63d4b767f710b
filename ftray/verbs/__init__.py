"""What each verb does. Each imports its rooms only when it is called, so that `ftray check` takes a second."""

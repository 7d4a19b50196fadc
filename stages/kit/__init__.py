"""The toolkit: functions and small modules that know nothing of methods, targets, tasks or sources."""

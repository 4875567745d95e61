"""The verbs: functions that a configuration's `task` names."""

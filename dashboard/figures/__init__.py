"""Charts: functions from data to a Plotly figure, one chart a file."""

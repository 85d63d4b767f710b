"""People compare the answers, not knowing whose they are. Read: sheet, answers, table, results, server, verb."""

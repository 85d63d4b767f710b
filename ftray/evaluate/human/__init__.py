"""Blinded comparison of answers by people. Start with sheet, answers, results, server."""

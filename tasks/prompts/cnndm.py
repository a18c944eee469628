"""Wording of CNN/DailyMail: an article, and a summary as long as the data set's own."""

INSTRUCTION = "Summarise each news article in three or four short sentences."

ARTICLE = "Article: {article}\n\nSummary:"

CHAT = (
    "Summarise this news article in three or four short sentences. Reply with the summary "
    "alone.\n\n{article}"
)

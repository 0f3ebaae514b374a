"""LotteryTicket, its rounds, and the snapshot that rounds rewind to."""

from lightning_sparse.methods.lottery_ticket.lottery_ticket import LotteryTicket

__all__ = ["LotteryTicket"]

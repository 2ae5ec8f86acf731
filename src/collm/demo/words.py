"""The words that the demo's world is made of."""

from __future__ import annotations

FIRST_NAMES = tuple(
    """
    Mira Tovin Elsa Odrin Kael Runa Silas Petra Jorun Vesna Alba Dorin Fenna Garo Hedda Ilan Jutta Koren Lumi Marek
    Nessa Orla Pavo Quill Rosa Sten Tilda Ulric Vida Wren Ysolde Zeno Anouk Brom Cleo Dagny Edda Frode Greta Halvar
    """.split()
)
LAST_NAMES = tuple(
    """
    Tolan Varn Brask Ellory Finch Gost Harrow Iversen Jarrow Kest Lund Morrow Nye Ostrin Pell Quist Rook Sarn Thorne
    Ulver Vance Wick Yarrow Zeller Abbot Birk Crane Dell Ember Frost Gale Holt Ives Juno Knoll Lark Moss Nord Oak
    Pike
    """.split()
)
TOWNS = tuple(
    """
    Brevik Calder Dunmore Eastby Farrow Glenloch Haverly Ingleby Kirkby Larkhill Milford Norwick Oakley Penrith
    Ravensby Selwick Thornby Ullswick Westmere Yarm
    """.split()
)
TRADES = tuple(
    """
    baker potter weaver miller tailor carpenter fisher cook tanner mason printer farmer doctor painter sailor
    teacher smith gardener barber clerk
    """.split()
)

"""Plain English texts of about 250 tokens each, on which tests compare an engine's predictions."""

TEXTS = (
    """\
The harbour had been dredged twice in the last century, and each time the sand came back. Engineers blamed
the river, which carried fine silt down from the hills every spring; fishermen blamed the breakwater,
which they said had been built in the wrong place by people who had never watched the tide. Both were
partly right. When the wind blew from the south-west for more than three days, the current along the coast
turned, and whatever the river had brought was pushed back through the narrow entrance and laid down in
long banks beside the quay. A ship that could leave on Monday might sit in the mud by Friday. In the
winter of 1952 the council asked a young surveyor to measure the banks every week for a year. She rowed
out with a weighted line, wrote the depths in a notebook, and drew them as curves on squared paper. What
she found was simple. The banks grew fastest not when the river was high but when it was falling, because
the water then had too little speed to carry its load and just enough to bring it as far as the entrance.
Her proposal was to move the outlet of the old mill stream, so that a small, steady flow would sweep the
channel when the river could not. It cost less than one season of dredging, and the harbour has been open
ever since.""",
    """\
A hash table stores pairs of keys and values so that the value of a key can be found in about the same
time however many pairs there are. It does this by computing a number from the key, the hash, and using
that number to choose a place in an array. Two different keys may be given the same place; this is called
a collision, and every hash table needs a rule for it. In the first rule, chaining, each place holds a
short list, and a search looks through the list for the key. In the second rule, open addressing, a key
whose place is taken moves on to another place, which is chosen in a fixed order, until a free one is
found. Open addressing needs no lists and keeps the data close together in memory, which modern processors
like, but it becomes slow when the array is nearly full, and removing a key needs care: if its place were
simply emptied, a later search could stop there too early and miss a key that had moved past it. For this
reason a removed key is often replaced by a mark that says that the place is free for new keys but not the
end of a search. When too many places are taken or marked, a larger array is made and all keys are put
into it again. This takes time in proportion to their number, but it happens so rarely that the average
cost of adding a key stays constant.""",
    """\
"You are early," said the clockmaker without looking up. "The shop opens at nine." It was eight minutes to
nine by the large clock on the wall, five minutes past by the one beside it, and a quarter to twelve by
the small gold watch that lay open on the bench in front of him. Anna put her parcel down next to the
watch and waited. She had carried it all the way from the station, wrapped in her brother's coat, and she
was not going to carry it back. The old man turned a screw by the width of a hair, listened, and turned it
back again. "What is it?" he asked at last. "It was my grandmother's," she said. "It stopped on the night
she died, and it has never gone since." He smiled for the first time. "They all say that. People wind a
clock every evening for forty years, and then there is nobody to wind it, and they are surprised that it
stops." He opened the coat, lifted the clock out, and held it to his ear, though there was nothing to
hear. Then he turned it over, and his face changed. On the back, beneath the maker's name, somebody had
scratched a row of letters and a date that was still two years away.""",
)

PROMPTS = (
    "The capital of France is",
    "Water boils at a temperature of",
    "Once upon a time there was a king who",
    "The three primary colours are",
    "To bake bread you need flour,",
    "The first president of the United States was",
    "def fibonacci(n):",
    "In the middle of the night the telephone",
    "The largest planet of the solar system is",
    "A good friend is somebody who",
)
"""Beginnings whose continuations are compared token by token."""

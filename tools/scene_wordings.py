"""How the questions about a story are worded, by kind; `{x}` is the thing asked about."""

from typing import NamedTuple


class Wording(NamedTuple):
    """Ways to say one question: those trained on, and others made of the same words."""

    train: tuple[str, ...]
    test: tuple[str, ...]


# A kind that can be asked with and without a name has its second form under "<kind> of x".
WORDINGS: dict[str, Wording] = {
    "colour_now": Wording(
        (
            "What colour is it?",
            "What colour is the shape?",
            "Which colour is the shape you see now?",
            "Please tell me the colour of the thing in view.",
            "What color is the object right now?",
            "Please name its colour.",
            "What is the color of what you see now?",
            "Which color does it have at the moment?",
        ),
        (
            "Which colour does it have right now?",
            "Please tell me the color of the shape in view.",
            "What is the colour of the object you see now?",
        ),
    ),
    "shape_now": Wording(
        (
            "What shape is it?",
            "Which shape do you see now?",
            "Tell me the shape of the thing in view.",
            "What is the shape of the object right now?",
            "Please name its shape.",
            "Which shape is visible now?",
            "What is the shape of what you see now?",
            "Which shape does it have at the moment?",
        ),
        (
            "Which shape is it now?",
            "Please tell me the shape of the object in view.",
            "What shape does it have right now?",
        ),
    ),
    "what_now": Wording(
        (
            "What do you see now?",
            "What is in view right now?",
            "Tell me what is visible now.",
            "What can you see at the moment?",
            "Please describe what is there now.",
            "What does the camera show now?",
            "Describe the newest frame.",
            "What is there right now?",
        ),
        (
            "What can you see right now?",
            "Please tell me what is in view at the moment.",
            "Describe what the camera can see now.",
        ),
    ),
    "where_now": Wording(
        (
            "Where is it?",
            "Where in the frame is it now?",
            "In which part of the frame is it?",
            "Tell me where it is now.",
            "Please say where the thing is.",
            "Where is the shape right now?",
            "Where can you see the object now?",
        ),
        (
            "Where is the object in the frame?",
            "Please tell me where the shape is now.",
            "In which part of the frame is the thing right now?",
        ),
    ),
    "where_now of x": Wording(
        (
            "Where is the {x}?",
            "Where is the {x} now?",
            "In which part of the frame is the {x}?",
            "Please tell me where the {x} is.",
            "Please say where the {x} is now.",
            "Where can you see the {x} right now?",
        ),
        ("Where in the frame is the {x}?", "Please tell me where you see the {x} now."),
    ),
    "first": Wording(
        (
            "What was the first thing?",
            "What did you see first?",
            "Which thing appeared first?",
            "Tell me the first shape you saw.",
            "Please name the first object.",
            "What came first?",
            "What was the first shape?",
            "What is the first thing that the camera did show?",
        ),
        (
            "Which object did you see first?",
            "Please tell me what appeared first.",
            "Which shape came first?",
        ),
    ),
    "last": Wording(
        (
            "What was the last thing?",
            "What did you see last?",
            "Which thing appeared last?",
            "Tell me the last shape you saw.",
            "Please name the last object.",
            "What came last?",
            "What was the last shape?",
            "What is the last thing that the camera did show?",
        ),
        (
            "Which object did you see last?",
            "Please tell me what appeared last.",
            "Which shape came last?",
        ),
    ),
    "after_x": Wording(
        (
            "What came after the {x}?",
            "Which thing appeared after the {x}?",
            "What did you see after the {x}?",
            "Please tell me what came right after the {x}.",
            "Please name the next thing after the {x}.",
            "After the {x}, what appeared?",
            "Which shape came next after the {x}?",
        ),
        (
            "What was the next thing after the {x}?",
            "Please tell me which shape you saw after the {x}.",
            "What appeared right after the {x}?",
        ),
    ),
    "before_x": Wording(
        (
            "What came before the {x}?",
            "Which thing appeared before the {x}?",
            "What did you see before the {x}?",
            "Tell me what came right before the {x}.",
            "Please name the thing just before the {x}.",
            "Before the {x}, what appeared?",
            "Which shape came just before the {x}?",
        ),
        (
            "What was the thing right before the {x}?",
            "Please tell me which shape you saw before the {x}.",
            "What appeared just before the {x}?",
        ),
    ),
    "all_in_order": Wording(
        (
            "What have you seen so far?",
            "What have you seen so far, in order?",
            "Which shapes have you seen so far?",
            "List all things in the order they appeared.",
            "Tell me everything that appeared, in order.",
            "Please list all the shapes so far, from first to last.",
            "Which things appeared, from first to last?",
            "List everything you have seen.",
        ),
        (
            "Which things have you seen so far?",
            "Please list all the shapes in the order they appeared.",
            "Tell me everything you have seen, from first to last.",
        ),
    ),
    "how_many": Wording(
        (
            "How many different things have you seen?",
            "How many different shapes have appeared so far?",
            "Tell me how many different things appeared.",
            "How many things have you seen so far?",
            "Please count the different things so far.",
            "What is the number of different objects so far?",
            "Count all the different objects you have seen.",
        ),
        (
            "How many different objects have you seen so far?",
            "Please tell me how many things have appeared.",
            "What is the number of different things you have seen?",
        ),
    ),
    "seen_x": Wording(
        (
            "Have you seen {x}?",
            "Did you see {x}?",
            "Has {x} appeared?",
            "Was there {x} so far?",
            "Did {x} appear at any time?",
            "Please tell me if you have seen {x}.",
            "Has there been {x}?",
            "Please say whether {x} has appeared.",
        ),
        (
            "Have you seen {x} at any time?",
            "Has {x} appeared so far?",
            "Please tell me whether you have seen {x}.",
        ),
    ),
    "visible_x": Wording(
        (
            "Is there {x} now?",
            "Can you see {x} right now?",
            "Is {x} visible now?",
            "Is {x} in view at the moment?",
            "Do you see {x} now?",
            "Tell me if {x} is there now.",
            "Does the camera show {x} right now?",
            "Please say whether {x} is visible at the moment.",
        ),
        (
            "Is there {x} in view right now?",
            "Do you see {x} at the moment?",
            "Please tell me whether {x} is visible now.",
        ),
    ),
    "when_x": Wording(
        (
            "When did the {x} appear?",
            "At what time did the {x} appear?",
            "When did you first see the {x}?",
            "At which second did the {x} appear?",
            "Tell me when the {x} appeared.",
            "Please say at what time you first saw the {x}.",
            "When was the {x} first visible?",
        ),
        (
            "At which second did you first see the {x}?",
            "Please tell me when you saw the {x}.",
            "At what time was the {x} first visible?",
        ),
    ),
    "motion_now": Wording(
        (
            "Is it moving, and which way?",
            "Which way is it moving?",
            "Is the thing moving or still?",
            "Tell me how it moves now.",
            "How does the shape move?",
            "In which direction is the object moving right now?",
            "Please say whether it is moving or still.",
        ),
        (
            "Is the shape moving, and which way?",
            "Please tell me how the object moves.",
            "In which direction is it moving now?",
        ),
    ),
    "motion_now of x": Wording(
        (
            "Is the {x} moving, and which way?",
            "Which way is the {x} moving?",
            "Is the {x} moving or still?",
            "Tell me how the {x} moves now.",
            "How does the {x} move?",
            "Please say whether the {x} is moving or still.",
        ),
        ("Please tell me how the {x} moves.", "In which direction is the {x} moving now?"),
    ),
    "colour_of_shape": Wording(
        (
            "What colour was the {x}?",
            "Which colour did the {x} have?",
            "Tell me the colour of the {x} you saw.",
            "What was the color of the {x}?",
            "Please name the colour of the {x}.",
            "You saw a {x}. What colour was it?",
            "What color did the {x} have?",
        ),
        (
            "Please tell me what colour the {x} was.",
            "Which color was the {x} you saw?",
            "What was the colour of the {x} you have seen?",
        ),
    ),
}

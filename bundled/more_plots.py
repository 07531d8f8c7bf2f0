"""More of what happens in the stories: plots in which the same things come back again and again (notation: `stories.py`)."""

from bundled.plot import Plot

TRADE = Plot(
    "trading things",
    {
        "thing1 thing2 thing3": "ball, kite, drum, spoon, bell, candle, basket, pillow, whistle, mirror, ribbon, cup",
        "trader1 trader2": "old goat, young pony, gray goose, busy hen, sleepy owl, little lamb, big pig, wise donkey",
    },
    """
{Day} {name} wanted to give {pos} friend {friend} a {thing3}, but {sub} had only a {color} {thing1}.
{Day} {friend_full} said, "I wish I had a {thing3}." But {name} had only a {color} {thing1}.

> {name} met [a|the] {trader1}. "I need a {thing1}," said the {trader1}. "I will give you a {thing2} for it."
> On the road {name} met [a|the] {trader1}. "Give me your {thing1}, and you may have my {thing2}," said the {trader1}.

So {name} gave the {thing1} to the {trader1} and got the {thing2}.
"Yes," said {name}, and took the {thing2} for the {color} {thing1}.

> Then {name} met [a|the] {trader2}. The {trader2} looked at the {thing2}. "I have a {thing3}. Shall we trade?"
> A little later [a|the] {trader2} came by. "What a fine {thing2}! I will give you my {thing3} for it," said the {trader2}.

"With joy!" said {name}, and gave the {trader2} the {thing2}. Now {name} had a {thing3}.
{name} gave the {thing2} to the {trader2} and [ran|hurried] away with the {thing3}.

> "Here is a {thing3} for you," said {name}. {friend} was so happy!
> {friend} saw the {thing3} and jumped for joy. "For me? Thank you, {name}!"

"First I had a {thing1}, then I had a {thing2}, and now you have a {thing3}," said {name}.
"A {thing1} for a {thing2}, and a {thing2} for a {thing3}," laughed {name}. "And the {thing3} is for you."
""",
)

HIDE = Plot(
    "hide and seek",
    {
        "spot1 spot2 spot3": (
            "under the bed, in the garden, behind the door, near the well, in the tall grass, beside the gate, under the "
            "old bench, behind the barn, inside a basket, in the big box, behind the curtain, under the bridge"
        ),
        "count": "ten, twenty, thirty, fifty",
        "sound": "a giggle, a sneeze, a cough, a little song",
    },
    """
{Day} {name} and {friend_full} played hide and seek. {friend} hid, and {name} counted to {count}.
{Day} {friend} said, "Let us play hide and seek!" {name} closed {pos} eyes and counted to {count}.

> "Where are you, {friend}?" called {name}. {Sub} looked {spot1}. No {friend}! {Sub} looked {spot2}. No {friend}!
> {name} looked {spot1}, but {friend} was not {spot1}. {name} looked {spot2}, but {friend} was not {spot2}.

{name} began to worry. "{friend}, {friend}, where are you?"
"{friend} is too good at this," said {name}.

> Then {name} heard {sound}. Was there somebody {spot3}?
> All at once there was {sound}. {name} ran to look {spot3}.

"I found you, {friend}!" cried {name}. {friend} had been {spot3} all the time.
There was {friend}, {spot3}! "You found me, {name}," said {friend}.

> "How did you know?" asked {friend}. "I heard {sound}," said {name}, and they both laughed.
> Now it was the turn of {friend} to count to {count}. And where did {name} hide? {Spot3}!
> "Next time I will not hide {spot3}," said {friend}.
""",
)

MARKET = Plot(
    "the market",
    {
        "food1 food2 food3": "apples, eggs, bread, cheese, carrots, honey, plums, nuts, milk, butter, onions, beans",
        "coins": "two, three, four, five, six, seven",
    },
    """
{Day} {pos} {family} gave {name} {coins} coins. "Please buy {food1}, {food2} and {food3}," said {pos} {family}.
{Day} {name} went to the market for {pos} {family} with {coins} coins. {Sub} had to buy {food1}, {food2} and {food3}.

> "{Food1}, {food2} and {food3}," sang {name} all the way.
> {name} said it again and again: "{Food1}, {food2} and {food3}."

On the way {name} met {friend_full}. They talked and talked, and {name} forgot what to buy.
But then a [dog|bird|cart] made a loud noise, and {name} could not remember the words.

> "I know the {food1} and the {food2}," said {name}, "but what was the last thing?"
> "It was {food1} and {food2} and... oh no!" said {name}.

"You sang about {food3}," said {friend}. "{Food3}! Thank you, {friend}!" said {name}.
{friend} thought hard. "I heard you say {food3}." "Yes, {food3}!" cried {name}.

> So {name} bought {food1}, {food2} and {food3} with the {coins} coins.
> At the market {name} paid {coins} coins for {food1}, {food2} and {food3}.

"{Food1}, {food2} and {food3}! You forgot nothing," said {pos} {family}.
{Pos} {family} looked into the basket and saw {food1}, {food2} and {food3}. "Well done, {name}!"
""",
)

PRESENT = Plot(
    "a birthday present",
    {
        "gift": "boat, doll, flute, scarf, lamp, book, drum, train, puzzle, clock",
        "paper": "paper with stars, paper with dots, old newspaper, a soft cloth, a big leaf",
        "place": "under the bed, in the cupboard, behind the stove, in the shed, on top of the shelf",
    },
    """
{Day} it was almost the birthday of {friend_full}. {name} made a {color} {gift} in secret.
{Day} {name} remembered that {friend} had a birthday soon. "I will make a {color} {gift}," {sub} thought.

> {name} wrapped the {gift} in {paper} and hid it {place}.
> When the {gift} was ready, {name} put {paper} around it and hid it {place}.

"What are you hiding, {name}?" asked {friend}. "Nothing," said {name}, and [looked away|turned red].
{friend} came in too early. "Is there something {place}?" asked {friend}. "No, no!" said {name}.

> {friend} was sad. "{name} has a secret and does not like me anymore," thought {friend}.
> That made {friend} a little sad. But {name} did not say a word about the {gift}.

At last the birthday came. {name} went to get the {gift}. It was still {place}. "This is for you, {friend}!"
On the birthday, {name} gave {friend} the present. "It was {place} all the time," said {name}.

> {friend} opened the {paper} and saw the {color} {gift}. "A {gift}! It is the best {gift} in the world!"
> Out of the {paper} came a {color} {gift}. "You made a {gift} for me!" cried {friend}.

"That was my secret," said {name}, and {friend} hugged {obj}.
"So that is what you were hiding," said {friend}. {name} [laughed|smiled].
""",
)

RACE = Plot(
    "a race",
    {
        "goal": "the old oak, the red gate, the mill, the white stone, the end of the field, the big well",
        "animal/trouble/help": (
            "beetle/lay on its back/turned it over, bird/had a string around its leg/took the string away, kitten/sat in a "
            "ditch/lifted it out, lamb/was stuck in a fence/pulled it free, snail/sat in the middle of the road/carried it "
            "to the grass, puppy/had lost its way/showed it the way home"
        ),
        "prize": "a cake, a gold cup, a medal, a basket of plums, a new hat",
    },
    """
{Day} there was a race to {goal}. The winner would get {prize}. {name} wanted to win, and so did {friend_full}.
{Day} {name} and {friend_full} ran a race. "The first one at {goal} gets {prize}," said {pos} {family}.

> "One, two, three, go!" {name} ran as fast as the wind. Soon {friend} was far behind.
> {name} ran and ran. {friend} ran too, but {name} was faster.

Then {name} saw a little {animal}. The {animal} {trouble}.
But beside the road there was a {animal}. It {trouble}. {name} stopped.

> "Run, or you will lose!" thought {name}. But {sub} went to the {animal} and {help}.
> "I cannot leave you here, little {animal}," said {name}. {Sub} {help}.

When {name} came to {goal}, {friend} was already there. {friend} had won {prize}.
Meanwhile {friend} ran past and was the first at {goal}.

> "Why did you stop?" asked {friend}. "There was a {animal}. It {trouble}," said {name}.
> {friend} had seen it all. "{name} helped the {animal}," {friend} told everyone.

"You are the real winner, {name}," said {friend}. "We will share {prize}."
"Then {prize} is for both of us," said {friend}. And the {animal} [came to thank|looked at] {name}.
""",
)

NEIGHBOR = Plot(
    "a new neighbor",
    {
        "house": "next door, across the road, on the other side of the pond, at the end of the path, behind the hill",
        "food": "soup, a pie, warm bread, a jar of honey, plum cake, nut cookies",
        "game": "chess, cards, ball, tag, dominoes, marbles",
    },
    """
{Day} somebody new came to live {house}. It was {friend_full}.
{Day} {name} saw a cart full of boxes {house}. A new neighbor had come! It was {friend_full}.

> {name} waved, but {friend} looked down and did not say a word. {friend} was very shy.
> {name} called "Hello!", but {friend} went in and closed the door.

"Maybe {friend} does not like me," said {name}. "Maybe {friend} is only shy," said {pos} {family}.
"Is {friend} angry?" asked {name}. "No," said {pos} {family}. "Everything is new for {friend}."

> So {name} took {food} and knocked at the {color} door {house}.
> The next day {name} brought {food} to {friend} and knocked on the {color} door.

The {color} door opened a little. "I am {name}, and this is {food} for you," said {name}.
"Hello, {friend}. My name is {name}," {sub} said through the {color} door. "I brought you {food}."

> {friend} smiled. "I love {food}! Do you want to play {game}?" So they ate {food} and played {game}.
> "Thank you, {name}," said {friend}. They ate {food} together, and then they played {game}.

Now {name} and {friend} play {game} every day.
"Come again tomorrow, {name}," said {friend}. "We can play {game} again."
""",
)

NIGHT = Plot(
    "a noise in the night",
    {
        "noise": "Tap tap tap!, Scratch scratch!, Bump bump!, Creak creak!, Whoo whoo!, Click click!",
        "where": "at the window, on the roof, under the floor, behind the wall, in the cupboard, at the door",
        "thought": "a ghost, a monster, a thief, a dragon, a giant",
        "truth/wish": (
            "a branch/the wind was playing with it, a hungry mouse/it wanted some cheese, a lost kitten/it wanted to come in, "
            "an owl/it was singing for its children, a loose board/it was moving in the wind, a beetle/it could not get out"
        ),
    },
    """
{Day} {friend_full} came to sleep in the house of {name}. In the middle of the night there was a noise {where}.
{Day} {friend} came to stay with {name} for the night. They had just put out the {color} lamp when they heard something {where}.

> "{noise}" "What is that?" whispered {friend}. "It sounds like {thought}!"
> "{noise}" it went. "It must be {thought}," said {friend}, and hid under the {color} blanket.

"{noise}" it went again {where}. {name} did not believe in {thought}, but {pos} heart beat fast.
{name} listened. "{noise}" There it was again, {where}. Was it really {thought}?

> "I will go and look," said {name}, and lit the {color} lamp.
> {name} took the {color} lamp in one hand and the hand of {friend} in the other.

{Sub} looked {where}. It was not {thought}. It was only {truth}, and {wish}!
And what did {name} see {where}? It was {truth}! So it was not {thought} at all, and {wish}.

> "It is only {truth}," said {name}. {friend} came out and laughed.
> "We were afraid of {truth}!" laughed {friend}. Then they slept until the sun came up.
""",
)

SNOW = Plot(
    "a snowman",
    {
        "nose": "a carrot, a pine cone, a red pepper, a potato, a stick",
        "eyes": "two buttons, two stones, two nuts, two bits of coal",
        "hat": "an old pot, a straw hat, a basket, a wool cap, a bucket",
    },
    """
{Day} the ground was white with snow. "Let us make a snowman!" said {name} to {friend_full}.
{Day} it snowed and snowed. {name} ran to {friend_full}. "Come out, {friend}! We can make a snowman!"

> They rolled a big ball, and a smaller ball, and a very small ball. But the snowman had no face.
> Soon the snowman was as tall as {friend}. "The snowman looks cold and has no face," said {name}.

"The snowman needs {eyes} for eyes and {nose} for a nose," said {friend}.
"I will bring {eyes}," said {name}. "And I will bring {nose}," said {friend}.

> So {eyes} became the eyes, and {nose} became the nose. {name} put {hat} on top.
> {name} brought {eyes}, {friend} brought {nose}, and for a hat the snowman got {hat}.

Then {name} tied {pos} {color} scarf around the snowman. "Now the snowman is warm," {sub} said.
"One thing is missing," said {name}, and gave the snowman {pos} {color} scarf.

> In the morning {nose} was gone! A [hungry rabbit|little bird] had taken it. {name} and {friend} laughed and found a new one.
> When the sun came back, only {hat}, {eyes} and the {color} scarf were left. "We will make another one," said {friend}.
> All winter the snowman with {hat} stood there, and every day {name} and {friend} said good morning to the snowman.
""",
)

LETTER = Plot(
    "a letter",
    {
        "news": "a big party, a new baby, a boat trip, a harvest feast, a puppet show, a song night",
        "trouble/dry": (
            "fell into a puddle/held it up to the sun, flew over a hedge/climbed over the hedge, slid under a rock/rolled the "
            "rock away, fell into the river/fished it out with a stick, landed on a high branch/shook the branch"
        ),
        "place": "the mill, the lake, the tower, the windmill, the market, the harbor",
    },
    """
{Day} {pos} {family} gave {name} a {color} letter. "Please take it to {friend} at {place}," said {pos} {family}.
{Day} {name} got a {color} letter to carry. It was for {friend_full}, who was at {place}.

> It was a long way to {place}. {name} held the {color} letter tight.
> "I will not lose it," said {name}, and walked and walked to {place}.

But a gust of wind came, and the {color} letter {trouble}.
Then {name} slipped, and the letter {trouble}. Oh no!

> "The letter!" cried {name}. Quickly {sub} {dry}.
> {name} did not give up. {Sub} {dry}, and there was the letter again.

At last {name} came to {place}. "Here is a letter for you, {friend}," {sub} said.
{friend} was waiting at {place}. "A {color} letter for me!" said {friend}.

> {friend} read it out loud. "There will be {news}, and {name} and {friend} are invited!"
> "It says that there will be {news}," said {friend}. "Will you go there with me, {name}?"

So {name} and {friend} went home from {place} together and talked about {news} all the way.
And that is how {name} and {friend} came to {news}.
""",
)

MUSIC = Plot(
    "music",
    {
        "tool/sound": (
            "drum/Boom, flute/Toot, fiddle/Fiddle-dee, bell/Ding, horn/Honk, triangle/Ting, harp/Pling, trumpet/Tara"
        ),
        "bad": "the cows ran away, the neighbors closed the windows, the hens hid in the barn, the dogs began to howl",
        "place": "in the barn, on the hill, in the forest, by the river, in the cellar",
    },
    """
{Day} {name} got a {color} {tool} from {pos} {family}. "{sound}, {sound}!" went the {tool}.
{Day} {name} found a {color} {tool} in the attic. "{sound}!" it went. "{sound}!"

> It was so loud that {bad}. "Please stop!" everybody said.
> {name} played the {tool} so badly that {bad}.

{name} was sad and put the {tool} away. But {friend_full} said, "I like your {tool}."
"Nobody likes my {tool}," said {name}. "I do," said {friend_full}. "You only need to practice."

> So {name} practiced {place} every day, where nobody could hear. "{sound}, {sound}!" And {friend} sang along.
> Day after day {name} and {friend} went to play {place}. "{sound}!" went the {tool}, a little better each time.

Then the summer feast came. {name} took the {color} {tool} and played, and {friend} sang.
At the feast {name} stood up with the {color} {tool}. {friend} stood beside {obj} and sang.

> "{sound}, {sound}!" Now nobody ran away. "Play it again, {name}!" they all called.
> Everyone danced. "We did not know that a {tool} could sound like that," said {pos} {family}.
""",
)

PLOTS = (TRADE, HIDE, MARKET, PRESENT, RACE, NEIGHBOR, NIGHT, SNOW, LETTER, MUSIC)

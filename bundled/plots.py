"""What happens in the stories, as text with drawn words (the notation: `stories.py`)."""

from bundled.plot import Plot

LOST = Plot(
    "something that got lost",
    {
        "thing": "ball, kite, drum, boat, doll, train, hat, bell, scarf, book, whistle, wagon",
        "spot1 spot2 spot3": (
            "under the bed, in the garden, behind the door, near the well, in the tall grass, beside the gate, under the "
            "old bench, behind the barn, inside a basket, on the kitchen table, by the mailbox, under the bridge"
        ),
        "joke": "a leaf, an old shoe, a sleepy snail, some dust, a nut",
    },
    """
{name} had a {color} {thing} and took it everywhere.
{Sub} had a {color} {thing}. It was a gift from {pos} {family}.
Of all {pos} things, {name} [liked|loved] {pos} {color} {thing} the most.

{Day} the {thing} was gone. "Where is my {thing}?" cried {name}.
{Day} {name} could not find the {thing}. {Sub} was [sad|worried|upset].
{Day} {sub} wanted to play with the {thing}, but it was not there. "Oh no!" said {name}.

> {Sub} looked {spot1}, but the {thing} was not there. Then {sub} looked {spot2} and saw only {joke}.
> First {name} looked {spot1}. Next {sub} looked {spot2}. There was {joke}, but no {thing}.
> Was it {spot1}? No. Was it {spot2}? No, there was only {joke}.

> "Why are you so sad?" asked {friend_full}. "I lost my {color} {thing}," said {name}.
> Then {friend} came by. "I lost my {color} {thing}," {name} said. "I have looked {spot1} and {spot2}."
> {Friend_full} heard {obj} cry. "What are you looking for?" asked {friend}. "My {color} {thing}," said {name}.

"Do not cry. We can look together," said {friend}.
"I will help you," said {friend}. "Two can look better than one."
"Let us look one more time," said {friend}.

> So they looked {spot3}, and there it was! "My {thing}!" [cried|shouted] {name}.
> The two friends looked {spot3}. "Here is your {color} {thing}!" said {friend}.
> Then {name} saw something {color} {spot3}. It was the {thing}!

{name} was so happy that {sub} hugged {friend}. Now {sub} always puts the {thing} away at night.
"Thank you, {friend}," said {name}. {Sub} held the {thing} [tight|close] all the way home.
They [danced|jumped] for joy, and {name} let {friend} hold the {thing} for a while.
""",
)

STUCK = Plot(
    "something stuck high up",
    {
        "thing": "kite, ball, hat, balloon, scarf, paper plane",
        "high": "in a tall tree, on the roof, on top of the wall, in the apple tree",
        "tool/tool_used": (
            "a long stick/pushed it with the long stick, a ladder/climbed up the ladder, a rope/threw the rope over it, a"
            " broom/reached up with the broom"
        ),
    },
    """
{Day} {name} went out to play with {pos} {color} {thing}. The wind was [strong|wild].
{Day} {name} and {friend} were playing outside with a {color} {thing}.
{name} had a new {color} {thing}. {Day} {sub} took it outside to show {friend}.

> Suddenly the wind took the {thing} away. It got stuck {high}.
> Whoosh! The {thing} flew up, up, up and landed {high}.
> But {name} threw it too high, and the {thing} got stuck {high}.

"Oh no, my {thing}!" cried {name}. {Sub} jumped and jumped, but {sub} was too [small|short].
{name} jumped as high as {sub} could, but {sub} could not reach it. {Sub} began to cry.
"It is too high for me," said {name} [sadly|softly].

> "Wait here," said {friend_full}. "I have {tool} at home."
> {friend} thought and thought. "I know!" said {friend}. "We need {tool}."
> "Do not worry," said {friend}. "I will bring {tool}."

Soon {friend} came back. {name} {tool_used}, and the {thing} came down.
{friend} held on while {name} {tool_used}. Down came the {color} {thing}!
Then {friend} {tool_used}. Plop! The {thing} fell [right beside|next to] {name}.

> "We did it!" they shouted. {name} gave {friend} a big hug.
> "You are so clever, {friend}!" said {name}. "Now let us play away from [trees|walls] and wind."
> "Thank you for helping me," said {name}. "Friends always help," said {friend}.
> {name} learned that with {tool} and a good friend, nothing is too high.
""",
)

BROKEN = Plot(
    "something that broke",
    {
        "thing": "wagon, boat, drum, train, chair, clock, music box, bird house",
        "fix": "glue, tape, string, wire, a hammer and nails",
        "part": "side, top, corner, handle",
    },
    """
{name} had made a {color} {thing} out of old wood. {Sub} was very proud of it.
{name} had a {color} {thing} that once was {pos} {family}'s.
{name} wanted to show {friend} {pos} {color} {thing}.

{Day} {sub} was [running|hurrying] with the {thing} and fell. Crack! The {part} broke.
{Day} {sub} dropped the {thing} on the [floor|stones]. Crack! Now the {part} was broken.
{Day} there was a loud crack. The {part} of the {thing} was broken!

> "My {thing} is ruined," said {name}, and a tear ran down {pos} [nose|cheek].
> {name} felt [awful|very sad]. "It will never be the same," {sub} said.
> "What will I do now?" cried {name}. {Sub} hid the broken {thing} and did not want to play.

{Friend_full} looked at it with care. "We can fix the {part} with {fix}," said {friend}.
"May I see it?" asked {friend}. "It is only the {part}. All we need is {fix}."
But {friend} smiled. "I broke a {thing} once too," said {friend}. "Do you have {fix}?"

> They found {fix} in a [box|drawer|shed]. {name} held the {thing} still while {friend} worked.
> {name} ran to get {fix}. Then they worked slowly until the {part} was [strong|whole] again.
> {friend} showed {obj} how to use {fix}, and {name} did the rest with {pos} own hands.

"Look, it works!" said {name}. The {color} {thing} was [better than before|as good as new].
At last the {thing} was done. "It is even [better|stronger] now," said {friend}, and {name} agreed.
{name} looked at the {color} {thing} and smiled. "Thank you, {friend}. You saved it!"
""",
)

SHARE = Plot(
    "sharing",
    {
        "thing": "swing, drum, wagon, bike, boat, sled, kite, scooter",
        "turns": "ten turns each, one song each, until the count of twenty, one trip around the garden each",
    },
    """
{Day} {name} and {friend} found a {color} {thing} [in the park|by the fence|near the school].
{Day} {name} and {friend} both wanted the same {color} {thing}.
{Day} there was a new {color} {thing} [in the park|in the yard]. {name} and {friend} ran to it.

> "I saw the {thing} first!" said {name}. "No, I did!" said {friend_full}.
> "It is mine!" shouted {name}. "No, it is my turn!" shouted {friend}.
> {name} pulled on one side of the {thing}. {friend} pulled on the other side. "Let go!" they both cried.

They were so angry that [neither of them|nobody] could play. {friend} sat down and began to cry.
{friend} walked away and sat under a tree. Now {name} had the {thing}, but it was no fun alone.
{name} turned {pos} back and {friend} did the same. The {thing} just stood there.

> {name} thought about it. {Sub} did not like to see {friend} so sad.
> After a while, {name} felt [sorry|lonely]. {Sub} missed {pos} friend.
> "Being angry is no fun," thought {name}, and {sub} took a deep breath.

"I am sorry," {sub} said. "We can take turns. {friend} first, then me."
"I am sorry I shouted," said {name}. "You can have the first turn, {friend}."
{Sub} [went|walked] over and said, "Let us share the {thing}. You may go first."

> {friend} smiled. "{Turns}!" said {friend}, and so they did.
> "{Turns}?" asked {friend}. "Yes!" said {name}.
> They made a rule: {turns}. It was [fair|easy], and nobody was angry again.

The {color} {thing} was much more fun with two.
All afternoon they took turns with the {color} {thing}.
{name} learned that sharing the {thing} was better than having it alone.
""",
)

AFRAID = Plot(
    "being afraid",
    {
        "fear/why/brave_act": (
            "the dark/there was a monster in the corner/turned off the lamp, thunder/the sky would fall down/went to the "
            "window and looked out, deep water/there was something under the water/jumped into the lake, the tall "
            "slide/the slide was as high as the moon/went up the steps and slid down, the old bridge/the bridge would "
            "break/walked to the other side, the big dog next door/the dog wanted to bite/held out a hand and let the dog"
            " sniff"
        ),
        "gift": "a lucky stone, a shiny button, a small feather, a tiny bell, a smooth shell",
    },
    """
But there was one thing that {name} did not like. {Sub} was afraid of {fear}.
{name} was [almost never|not often] afraid, but {sub} was afraid of {fear}.
{name} had a secret. {Sub} was very much afraid of {fear}.

"I think that {why}," {sub} told {friend_full}.
{Sub} was sure that {why}. {Pos} knees shook.
When {sub} closed {pos} eyes, {sub} thought that {why}.

> {Day} {friend} [saw|noticed] that {name} was shaking. "What is wrong?" asked {friend}.
> {Day} {friend} asked, "Why do you look so [pale|scared]?"
> {Day} {name} began to cry, and {friend} came to sit beside {obj}.

"I am afraid of {fear}," said {name}. "I was afraid of {fear} too," said {friend}.
"It is {fear}," {name} whispered. {friend} did not laugh. "Everyone is afraid of something," said {friend}.

> {friend} gave {obj} {gift}. "Hold this when you are scared, and count to [three|five|ten]."
> "Take {gift}," said {friend}. "It will help you to be brave, and I will stay close."

{name} held the gift tight, counted out loud and {brave_act}. Nothing bad happened!
So {name} took a deep breath, counted slowly and {brave_act}. It was not so bad at all!
{Pos} heart went boom, boom, boom. But {name} {brave_act}, and {sub} was fine.

> "I did it!" shouted {name}. {Sub} was not afraid of {fear} anymore.
> "You were so brave!" said {friend}. {name} was very proud and put {gift} under {pos} pillow.
> After that day, {fear} did not scare {name}. And {sub} kept {gift} for a long, long time.
""",
)

CREATURE = Plot(
    "a hurt animal",
    {
        "animal/food/sound": (
            "bird/seeds/Peep, kitten/milk/Meow, puppy/bread/Woof, lamb/grass/Baa, chick/corn/Cheep, pony/apples/Neigh, "
            "goat/carrots/Maa, owl/berries/Hoo"
        ),
        "trouble/care": (
            "had a hurt leg/put a soft bandage on its leg, was cold and wet/wrapped it in a warm blanket, was lost/made a"
            " bed of straw for it, was caught in a bush/pulled the thorns away"
        ),
        "pet": "Button, Pip, Star, Cloud, Pepper, Snow, Sunny, Bean",
    },
    """
{Day} {name} heard a small sound behind a [bush|rock|fence]. "{sound}, {sound}!"
{Day} {sub} was walking along the path. "{sound}!" said something very small.
{Day} {name} and {friend} were walking home when they heard a sound. "{sound}! {sound}!"

It was a little {color} {animal}. It {trouble}.
There sat a tiny {color} {animal}. The poor thing {trouble}.
{name} looked closer. It was a {color} {animal}, and it {trouble}.

> "Do not be afraid, little {animal}," said {name}. "I will help you."
> "Oh, you poor {animal}!" said {name}. {Sub} [bent down|knelt] and spoke in a soft voice.
> {name} felt sorry for the {animal}. "I have to do something," {sub} said.

Very gently, {sub} {care}. But the {animal} was still hungry.
{Sub} carried it home and {care}. "Now you need to eat," {sub} said.
{name} {care}, and the {animal} stopped shaking.

> {Friend_full} came with some {food}. The {animal} ate it all [up|and wanted more].
> "What does a {animal} eat?" asked {name}. "{Food}," said {friend}, and went to get some.
> {friend} brought {food} and water. "{sound}!" said the {animal}, and ate and ate.

They called it {pet}, and every day {pet} got [better|stronger].
"Let us call it {pet}," said {name}. {pet} liked the name.
"You are as good as new, {pet}!" said {name} the next morning.

> "{sound}!" said {pet}, and followed {name} everywhere.
> Now {name}, {friend} and {pet} the {animal} play together every day.
> In the end {pet} found its family again, but it often came back to visit {name}.
""",
)

BAKING = Plot(
    "cooking",
    {
        "dish": "cake, pie, stew, pudding, pizza, salad",
        "missing/number": "eggs/three, apples/six, carrots/five, tomatoes/four, plums/seven, nuts/nine",
        "feast": "birthday, party, dinner, picnic",
    },
    """
{Day} {name} wanted to make a {dish} for {pos} {family}'s {feast}.
"Tomorrow is my {feast}," said {pos} {family}. "Then I will make a {dish}!" said {name}.
{Day} {sub} thought, "I will make a {dish} for the {feast}. {Family} will be so happy!"

{Sub} put on {pos} {color} apron and took out a big bowl.
{name} washed {pos} hands, put on a {color} apron and began to [stir|mix].
{Sub} put on {pos} {color} apron and read the old recipe.

> But there were no {missing} left! "I need {number} {missing}," said {name}.
> Then {name} stopped. "Oh no, there are no {missing}! I need {number} of them."
> "One, two... wait!" said {name}. "I need {number} {missing}, and I do not have any."

{Sub} ran to see {friend_full}. "May I have {number} {missing}?" {sub} asked.
So {sub} went next door to {friend_full} and asked for {number} {missing}.
{name} took a basket and walked to {friend}. "Do you have {number} {missing} for me?" asked {name}.

> "Of course," said {friend}. "You may have {number} {missing}, and I can help you too."
> {friend} smiled and put {number} {missing} in a basket. "Can I help?" asked {friend}.
> "I have just {number} {missing} left," said {friend}. "Take them all! But I would like a taste."

Together they made the {dish}. It smelled [wonderful|so good].
They worked all [morning|afternoon]. There was sugar on the table and flour on the floor.
{name} and {friend} mixed and stirred until the {dish} was ready.

> On the big day, everyone ate the {dish}. "This is the best {dish} ever," said {pos} {family}.
> When {pos} {family} saw the {dish}, there was a big smile. "Did you make this, {name}?"
> The {feast} was a great success. {name} gave the first bite of the {dish} to {friend}.
""",
)

RAIN = Plot(
    "a rainy day",
    {
        "plan/item": (
            "go to the beach/bucket, have a picnic/basket, fly kites/kite, ride bikes/bike, play football/ball, sail toy "
            "boats/boat"
        ),
        "indoor/made": (
            "build a castle/a tall castle out of boxes, build a tent/a big tent out of blankets, make a ship/a grand ship"
            " out of chairs, put on a show/a stage out of pillows, make a train/a long train out of boxes"
        ),
    },
    """
{Day} {name} and {friend} wanted to {plan}. {name} had a {color} {item} ready.
{Day} {name} put a {color} {item} by the door. {Sub} was going to {plan} with {friend}.
"Today we will {plan}!" said {name} to {friend_full}, and got the {color} {item}.

> But then it began to rain. Drip, drop, drip, drop! "We cannot {plan} now," said {name}.
> Then dark clouds came, and the rain fell [hard|fast]. "Our day is ruined," said {name}.
> Suddenly there was a [flash|boom], and it rained and rained. "Now we cannot {plan}," {sub} said.

{Sub} put the {item} down and sat by the window with a long face.
{name} was very [sad|upset]. {Sub} pushed the {color} {item} into a corner.
{Sub} looked at the gray sky and wanted to cry.

> {friend} looked around the room. "I have an idea," said {friend}. "We can {indoor}!"
> "Rain cannot stop us," said {friend}. "Let us {indoor}!"
> "Do you know what we can do inside?" asked {friend}. "We can {indoor}!"

So they made {made}. Even the {color} {item} was [useful|a part of it].
They made {made} and put the {item} on top. How they laughed!
{name} forgot about the rain. Together they made {made}.

> When the rain stopped, {name} did not even see it. "Can we {indoor} again tomorrow?" {sub} asked.
> Later the sun came out, and there was a rainbow. "Shall we {plan} now?" asked {friend}. "Yes!" said {name}.
> "I am glad that it rained," said {name}. "We can {plan} another day."
""",
)

LEARN = Plot(
    "learning something new",
    {
        "skill/skilled/slip": (
            "swim/swam/got water in the nose, ride a bike/rode the bike/fell off the bike, whistle/whistled/made only a "
            "hiss, skate/skated/slipped on the ice, climb a rope/climbed the rope/slid back down, juggle/juggled/dropped "
            "all the balls, jump over the stream/jumped over the stream/landed in the mud, play the flute/played the "
            "flute/made an awful noise"
        ),
        "count": "three, five, seven, ten",
    },
    """
All of {pos} friends could {skill}, but {name} could not.
{Day} {name} saw {friend} {skill}. "I want to do that too!" said {name}.
More than anything, {name} wanted to learn to {skill}.

{Sub} tried, but {sub} {slip}. Someone laughed.
{Sub} tried for the first time and {slip}. It was much harder than it looked.
The first time, {name} {slip}. The second time, {sub} {slip} again.

> "I will never learn to {skill}," said {name}. {Sub} wanted to give up.
> "I cannot {skill}. It is too hard!" {sub} cried.
> {name} sat down on the ground. "Maybe I am too little to {skill}," {sub} said.

"Nobody can do it the first time," said {friend_full}. "I needed {count} days."
"Try a little every day," said {friend}. "It took me {count} days to learn."
"Do not give up," said {friend_full}. "Try it {count} more times, and I will watch."

> So {name} tried again and again. Day after day {sub} got a little better.
> {name} [wiped|dried] {pos} eyes and tried again. {friend} clapped each time.
> Every morning {sub} got up early and tried. Some days {sub} {slip}, but {sub} did not stop.

After {count} days, {name} {skilled} all alone!
And then it happened. {name} {skilled}, and nobody had to help!
At last {sub} {skilled} from start to end. {friend} [cheered|clapped] loudly.

> "I can {skill}!" [shouted|cried] {name}. "I knew you could," said {friend}.
> {name} was very proud. Now {sub} teaches others to {skill}.
> "Thank you for not laughing," said {name}. "Now we can {skill} together!"
""",
)

HONEST = Plot(
    "telling the truth",
    {
        "thing": "cup, vase, lamp, plate, bowl, mirror, flower pot, teapot",
        "hiding": "under a rug, behind the curtain, in a drawer, under the bed, in a box",
        "chore": "wash the dishes, water the plants, sweep the floor, set the table, feed the hens",
    },
    """
{Day} {name} was playing inside, and {sub} bumped into the table. Crash! {Pos} {family}'s {color} {thing} broke.
{Day} {name} and {friend} were running in the kitchen. Crash! {name} had broken the {color} {thing}.
{Pos} {family} had a {color} {thing}. {Day} {name} picked it up, and it slipped. Crash!

{Sub} was scared. Quickly {sub} hid the pieces {hiding}.
"Nobody must know," thought {name}, and hid the broken {thing} {hiding}.
{name} did not know what to do, so {sub} put the pieces {hiding}.

> "Where is my {color} {thing}?" asked {pos} {family} [later|at supper]. {name} said nothing.
> That evening {pos} {family} asked, "Has anyone seen my {thing}?" {name} looked at the floor.
> Soon {pos} {family} was looking for the {thing}. "I do not know where it is," said {name}.

But {sub} felt bad. {Pos} tummy hurt, and {sub} could not [eat|sleep].
{Sub} felt as if a heavy stone were in {pos} tummy.
It was not true, and {name} felt worse and worse.

> {name} told {friend_full} everything. "Tell the truth," said {friend}. "You will feel better."
> "You should say what happened," said {friend_full}. "I will go with you."
> {name} asked {friend} what to do. "If you did it, say it," said {friend}. "That is the brave way."

So {name} took out the pieces and said, "I broke the {thing}. I am sorry."
"I broke your {color} {thing}," {name} told {pos} {family}. "I hid it {hiding}. I am so sorry."
{name} went to {pos} {family} and cried, "It was me! I broke it and hid it {hiding}."

> {Pos} {family} gave {obj} a hug. "A {thing} is only a {thing}. I am glad you told me the truth."
> "Thank you for telling me," said {pos} {family}. "You can {chore} for me, and then we will forget the {thing}."
> {Pos} {family} was not angry for long. {name} had to {chore} for a week, but {sub} felt [light|happy] again.
""",
)

GARDEN = Plot(
    "a garden",
    {
        "plant/fruit": (
            "sunflower/a flower as big as a plate, bean/long green beans, pumpkin/a huge round pumpkin, rose/a sweet red "
            "rose, apple tree/one small sweet apple, strawberry/ten sweet strawberries"
        ),
        "place": "behind the house, by the fence, near the well, on the hill, beside the path",
        "danger/guard": (
            "the sun was too hot/held an umbrella over it, the wind was too strong/tied it to a stick, the birds wanted "
            "to eat it/made a straw man with a hat, the ground was too dry/carried water every day"
        ),
    },
    """
{Day} {pos} {family} gave {obj} a tiny {plant} seed.
{Day} {name} found a tiny seed on the path. "That is a {plant} seed," said {pos} {family}.
{Day} {name} got a seed in a little {color} bag. It was a {plant} seed from {friend}.

{Sub} dug a hole {place}, put the seed in and gave it water from a {color} can.
With {pos} own hands {sub} planted the seed {place}. {Sub} put a {color} stone beside it.
{name} planted it {place} and put a {color} fence around it.

> {Sub} waited and waited, but nothing came up. "Is it asleep?" {name} asked.
> The next day {name} ran to look, but there was only dirt. "Grow, little {plant}!" {sub} said.
> Every morning {name} looked {place}. Every morning there was nothing to see.

"A {plant} needs time," said {friend_full}. "You have to wait."
{Friend_full} came to look at it too. "Do not dig it up," said {friend}. "It is growing in the dark."

> Then one day a tiny green leaf came up. But {danger}!
> At last there was something green {place}! But {danger}, and the {plant} began to look sick.

"I will take care of you," said {name}, and {sub} {guard}.
{name} thought hard. Then {sub} {guard}, and the little plant was safe.
So {friend} and {name} worked together. {name} {guard}.

> By the end of summer there was {fruit}. "You did it!" said {friend}.
> The {plant} grew and grew, and one day {name} found {fruit}. {Sub} shared it with {friend}.
> And what did {name} find {place} one fine morning? It was {fruit}! {Sub} was so proud.
""",
)

WAY_HOME = Plot(
    "getting lost in the woods",
    {
        "seen1 seen2 seen3": (
            "tall pine tree, big round rock, red mill, wooden bridge, field of flowers, empty hut, stone wall, little stream"
        ),
        "want": "berries, feathers, mushrooms, pretty stones, wild flowers, pine cones",
    },
    """
{Day} {name} went into the [woods|hills] to look for {want}. {Sub} wore a {color} coat.
{Day} {name} put on a {color} coat and went out alone to find {want}.
{Day} {pos} {family} wanted {want}. {name} took a {color} bag and went to look.

{Sub} walked past a {seen1}. Then {sub} walked past a {seen2}, and then past a {seen3}.
First {sub} came to a {seen1}, next to a {seen2}, and last to a {seen3}.

> There {name} found {want}. But when {sub} turned around, {sub} did not know the way home.
> {name} was happy to find {want} there. But now it was getting dark, and {sub} was lost!

"Help! Is anyone there?" {sub} called. It was very quiet.
{Sub} wanted to be brave, but {pos} eyes were full of tears.
{name} sat down on the ground. "I want to go home," {sub} said.

> Then {friend_full} came along. "Are you lost? Tell me what you saw on the way," said {friend}.
> "Who is crying?" asked a voice. It was {friend_full}. "Tell me, what did you see on your way?"

"First a {seen1}, then a {seen2}, and then a {seen3}," said {name}.
{name} thought. "I saw a {seen1}, then a {seen2}, and at last a {seen3}."

> "Then we must go the other way around," said {friend}. They went to the {seen3}, to the {seen2} and to the {seen1}.
> So they walked back. They passed the {seen3}. They passed the {seen2}. And after the {seen1}, {name} could see {pos} home.

"I am home!" cried {name}. {Pos} {family} came running out and thanked {friend}.
At the door, {name} gave {friend} some of the {want}. "Thank you for taking me home," {sub} said.
{Pos} {family} [hugged|kissed] {name} and asked {friend} to stay for supper.
""",
)

PLOTS = (LOST, STUCK, BROKEN, SHARE, AFRAID, CREATURE, BAKING, RAIN, LEARN, HONEST, GARDEN, WAY_HOME)

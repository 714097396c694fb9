"""The word lists and fixed answers that generate_text.py draws from."""

# Never used in training; evaluate.py asks about them.
HELD_OUT = (
    "Quentin", "Saskia", "Orlando", "Brunhilde", "Tamsin", "Ludovic", "Wilma", "Zebedee", "Katinka", "Jasper",
    "Mirabel", "Thorben", "Delphine", "Cosima", "Ravi", "Yolanda", "Gustav", "Philippa", "Imogen", "Barnaby",
)
NAMES = (
    "Zoe Anna Ben Clara David Emma Felix Greta Hugo Ida Jack Karl Lily Mia Noah Oscar Paul Ruby Sam Tom Eva Leo Max Nina Otto "
    "Alice Bob Carol Dan Erik Fiona George Hanna Ivan Julia Kate Lucas Maria Nora Olivia Peter Rosa Simon Tina Uma Victor Wendy "
    "Xavier Yusuf Amir Bella Cleo Dora Elias Frida Gina Henry Iris Jonas Kira Lena Milo Nils Olga Pia Ralf Sofia Theo Ursula Vera "
    "Will Yara Zack Aisha Boris Chloe Diego Ella Finn Gloria Harry Ingrid James Kim Lola Mary Nick Omar Penny Robin Sara Tara "
    "Violet Walter Yuki Adam Amy Arthur Betty Charlie Daisy Edward Ellen Frank Grace Helen Isaac Jane John Laura Linda Luna Mark "
    "Martin Molly Oliver Pam Rita Roger Rose Sophie Stella Susan Thomas Tim Tina Toby Wanda Bruno Coco Rex Bella Rocky Ginger "
    "Pepper Biscuit Pip Poppy Hazel Ivy Jade Maya Alex Chris Lee Kai Ali Ahmed Fatima Wei Mei Li Raj Priya Carlos Pedro Lucia"
).split()
ONSETS = (
    "b c d f g h j k l m n p r s t v w z b d f g k l m n p r s t v z br cl dr fl gr kr pl sl st tr sh ch th sk sp qu"
).split()
VOWELS = "a a a e e e i i i o o o u u y ai ea ee oo ou ia io".split()
CODAS = ("", "", "", "", "n", "r", "l", "s", "m", "t", "k", "x", "nd", "rt", "ck", "sh", "ll", "b", "d", "g", "lo", "na", "by", "ton")
CITIES = (
    "Oslo Paris London Rome Madrid Berlin Vienna Athens Lisbon Dublin Prague Warsaw Helsinki Stockholm Copenhagen Amsterdam Brussels "
    "Bern Cairo Tokyo Beijing Delhi Ottawa Lima Havana Boston Chicago Seattle Dallas Denver Munich Hamburg Zurich Geneva Milan Naples "
    "Venice Barcelona Porto Lyon Nice Oxford York Glasgow Sydney Melbourne Toronto Montreal Mumbai Seoul Nairobi Lagos Dakar Santiago "
    "Bogota Riga Tallinn Sofia Budapest Krakow Istanbul Ankara Dubai Austin Miami Bergen Basel Turin Kyoto"
).split()
CITIES += ["New York", "San Francisco", "Los Angeles", "Cape Town", "Mexico City", "Hong Kong"]
ANIMALS = (
    "fox cat dog rabbit bear owl mouse horse cow pig sheep goat duck hen frog lion tiger elephant monkey wolf deer squirrel hedgehog "
    "badger otter beaver turtle snail snake crow swan goose robin eagle parrot penguin whale dolphin shark fish crab octopus bee ant "
    "spider butterfly ladybird camel donkey zebra giraffe hippo kangaroo koala panda mole bat rat hamster dragon unicorn dinosaur "
    "peacock pony puppy kitten lizard seal"
).split()
PEOPLE = (
    "girl boy woman man king queen prince princess baker farmer sailor teacher doctor painter tailor gardener fisherman robot wizard "
    "witch knight pirate giant ghost grandmother grandfather miller postman cook shepherd lamplighter astronaut detective programmer"
).split()
ADJECTIVES = (
    "brave small clever kind lazy curious old young happy sad shy proud quiet sleepy hungry friendly funny wise tiny gentle grumpy "
    "cheerful lonely careful greedy strong quick slow patient polite silly lucky busy"
).split()
OBJECTS = (
    "ball kite book lamp boat key hat drum bell box cup clock coat ring map chair shoe spoon flute doll umbrella basket bottle candle "
    "coin mirror pencil letter stone feather flag guitar hammer ladder wheel scarf violin bicycle train car robot computer telescope "
    "blanket pillow sword crown apple pear cake table door window pot broom rope bag balloon whistle lantern teapot"
).split()
OBJECT_ADJECTIVES = "red blue green yellow golden silver small big old new shiny wooden round little white black magic broken".split()
PLACES = (
    "in the forest", "in a small village", "by the sea", "on a farm", "in a big city", "on a high mountain", "in a castle", "by the river",
    "on a small island", "in a cave", "in a garden", "under an old bridge", "in a tall tower", "in the desert", "in a little house",
    "at the edge of the wood", "in a lighthouse", "in the mountains", "by a quiet lake", "in a library", "on a ship", "in the snow",
    "in an old mill", "on the moon", "in the jungle", "in a school",
)
SKILLS = ("swim", "sing", "paint", "dance", "read", "cook", "fly a kite", "ride a bicycle", "play the flute", "skate", "juggle", "write letters", "climb trees", "whistle")
FOODS = ("cake", "bread", "soup", "pie", "apple pie", "pancakes", "pizza", "cheese", "rice", "honey cake", "noodles", "porridge")
BAKED = ("cake", "pie", "bread", "apple pie", "pizza", "honey cake", "chocolate cake")
PLANTS = ("sunflower", "apple tree", "rose bush", "tulip", "pear tree", "bean plant", "lily")
GOALS = ("the hidden valley", "the old castle", "the silver lake", "the end of the river", "the highest hill", "the lost garden", "the blue island", "the empty lighthouse")
BUILDS = ("boat", "house", "bridge", "tree house", "tower", "sledge", "bench", "windmill")
COLOURS = "red blue green yellow black white brown orange purple pink grey".split()
JOBS = "baker doctor teacher writer painter farmer nurse pilot cook driver gardener engineer singer tailor lawyer sailor".split()
ROOMS = ("kitchen", "bedroom", "bathroom", "living room", "garage", "hall", "office", "garden", "cellar")
LANGUAGES = "French German Spanish Italian Dutch Polish Greek Japanese Chinese Arabic Swedish Danish".split()
KEYS = (
    "id name age city country title value count price size colour status type kind level score weight height email phone key user item "
    "date day year code text limit target source language unit total amount label category ready done valid"
).split()
NUMBER_WORDS = {2: "two", 3: "three", 4: "four", 5: "five", 6: "six"}

DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February March April May June July August September October November December".split()
ORDINALS = "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth".split()
CAPITALS = (
    ("France", "Paris"), ("Germany", "Berlin"), ("Italy", "Rome"), ("Spain", "Madrid"), ("Norway", "Oslo"), ("Sweden", "Stockholm"),
    ("Denmark", "Copenhagen"), ("Finland", "Helsinki"), ("Poland", "Warsaw"), ("Austria", "Vienna"), ("Greece", "Athens"),
    ("Portugal", "Lisbon"), ("Ireland", "Dublin"), ("England", "London"), ("Belgium", "Brussels"), ("Switzerland", "Bern"),
    ("Hungary", "Budapest"), ("Egypt", "Cairo"), ("Japan", "Tokyo"), ("China", "Beijing"), ("Canada", "Ottawa"), ("Peru", "Lima"),
    ("Cuba", "Havana"), ("Russia", "Moscow"), ("Turkey", "Ankara"), ("Kenya", "Nairobi"), ("Chile", "Santiago"), ("India", "New Delhi"),
    ("Australia", "Canberra"), ("Brazil", "Brasilia"), ("Iceland", "Reykjavik"), ("South Korea", "Seoul"), ("the Netherlands", "Amsterdam"),
    ("the United States", "Washington"), ("Mexico", "Mexico City"), ("Argentina", "Buenos Aires"),
)
THING_COLOURS = (
    ("the sky", "blue"), ("grass", "green"), ("snow", "white"), ("coal", "black"), ("a banana", "yellow"), ("a lemon", "yellow"),
    ("blood", "red"), ("milk", "white"), ("a tomato", "red"), ("chocolate", "brown"), ("the sun", "yellow"), ("an elephant", "grey"),
    ("a frog", "green"), ("a carrot", "orange"), ("the sea", "blue"), ("a polar bear", "white"), ("a crow", "black"), ("a fire engine", "red"),
    ("a plum", "purple"), ("a flamingo", "pink"), ("a cucumber", "green"), ("a strawberry", "red"),
)
OPPOSITES = (
    ("hot", "cold"), ("big", "small"), ("fast", "slow"), ("old", "young"), ("happy", "sad"), ("day", "night"), ("up", "down"),
    ("left", "right"), ("open", "closed"), ("full", "empty"), ("hard", "soft"), ("light", "dark"), ("rich", "poor"), ("strong", "weak"),
    ("wet", "dry"), ("long", "short"), ("loud", "quiet"), ("early", "late"), ("good", "bad"), ("thick", "thin"), ("clean", "dirty"),
    ("near", "far"), ("high", "low"), ("black", "white"), ("yes", "no"), ("true", "false"), ("first", "last"), ("inside", "outside"),
)
SOUNDS = (("dog", "woof"), ("cat", "meow"), ("cow", "moo"), ("sheep", "baa"), ("pig", "oink"), ("duck", "quack"), ("horse", "neigh"), ("mouse", "squeak"), ("frog", "croak"), ("bee", "buzz"), ("owl", "hoot"), ("lion", "roar"), ("snake", "hiss"), ("crow", "caw"))
YOUNG = (("dog", "puppy"), ("cat", "kitten"), ("cow", "calf"), ("sheep", "lamb"), ("horse", "foal"), ("pig", "piglet"), ("duck", "duckling"), ("bear", "cub"), ("goat", "kid"), ("frog", "tadpole"), ("swan", "cygnet"), ("goose", "gosling"), ("kangaroo", "joey"))
LEGS = (("dog", "four"), ("cat", "four"), ("spider", "eight"), ("bee", "six"), ("ant", "six"), ("bird", "two"), ("horse", "four"), ("snake", "no"), ("fish", "no"), ("duck", "two"), ("elephant", "four"), ("butterfly", "six"), ("hen", "two"), ("man", "two"))
COUNTS = (
    ("days", "a week", "seven"), ("months", "a year", "twelve"), ("hours", "a day", "twenty-four"), ("minutes", "an hour", "sixty"),
    ("seconds", "a minute", "sixty"), ("seasons", "a year", "four"), ("weeks", "a year", "fifty-two"), ("days", "a year", "365"),
    ("letters", "the alphabet", "twenty-six"), ("sides", "a triangle", "three"), ("sides", "a square", "four"), ("fingers", "a hand", "five"),
    ("wheels", "a car", "four"), ("planets", "the solar system", "eight"), ("years", "a century", "one hundred"), ("cents", "a euro", "one hundred"),
)
CATEGORIES = {
    "fruits": ["apple", "pear", "plum", "banana", "cherry", "lemon", "orange", "grape", "peach", "mango"],
    "vegetables": ["carrot", "potato", "onion", "tomato", "cabbage", "pea", "bean", "cucumber"],
    "animals": ["fox", "cat", "dog", "horse", "cow", "owl", "lion", "bear", "wolf", "mouse"],
    "birds": ["robin", "crow", "owl", "swan", "eagle", "duck", "goose", "parrot"],
    "colours": COLOURS,
    "cities": ["Paris", "London", "Rome", "Oslo", "Berlin", "Vienna", "Madrid", "Tokyo", "Cairo"],
    "countries": ["France", "Germany", "Italy", "Spain", "Norway", "Japan", "Canada", "Egypt", "Brazil"],
    "tools": ["hammer", "saw", "ladder", "rope", "needle", "brush", "spade"],
    "days": DAYS,
    "months": MONTHS,
    "seasons": ["spring", "summer", "autumn", "winter"],
    "planets": ["Mercury", "Venus", "Earth", "Mars", "Jupiter", "Saturn", "Uranus", "Neptune"],
}
SINGULARS = {"fruits": "fruit", "vegetables": "vegetable", "animals": "animal", "birds": "bird", "colours": "colour", "cities": "city", "countries": "country", "tools": "tool", "seasons": "season", "planets": "planet"}

REVIEWED = ("The film", "This book", "The food", "The hotel", "The service", "My new phone", "The concert", "The weather", "This restaurant", "The teacher", "The game", "The trip", "This product", "The room")
GOOD_WORDS = ("great", "wonderful", "excellent", "lovely", "fantastic", "very good", "amazing", "delightful", "perfect", "nice", "brilliant", "superb")
BAD_WORDS = ("terrible", "awful", "boring", "bad", "horrible", "very bad", "disappointing", "ugly", "poor", "dreadful", "slow and noisy", "disgusting")
SENTIMENT_FRAMES = ("{what} was {how}.", "{what} is {how}!", "I think {what} was {how}.", "{what} was really {how}.", "[Honestly|For me], {what} was {how}.")
SENTIMENT_REQUESTS = (
    "Is this positive or negative? {text}", "Positive or negative: {text}", "Classify the sentiment as positive or negative: {text}",
    "What is the sentiment of this text? {text}", "Sentiment of \"{text}\"?", "Classify this sentiment: {text}", "{text} Is that positive or negative?",
)
POEMS = (
    "{A_thing} is [small|fine|bright], {a_thing} is [free|new],\nthe sky above is wide and blue.\n[I see it here, I see it there|It sings at night, it sings at noon],\n{a_thing} is [always in the air|dancing with the moon].",
    "Oh {thing}, oh {thing}, how [bright|merry] you are,\nyou [shine|glow] in the night like a little star.\nWhen morning comes and the sky is red,\nthe {thing} lies down and goes to bed.",
    "I had {a_thing}, I had a dream,\nwe sailed together down the stream.\nThe wind was soft, the sun was low,\nand where we went, we did not know.",
    "The {thing} said good morning, the {thing} said good day,\nand nobody wanted the {thing} to go away.\nThe rain fell down and the wind blew cold,\nbut the {thing} had a heart of gold.",
)

SYSTEMS = (
    "You are a helpful assistant.", "You are a helpful assistant.", "You are a helpful AI assistant.", "You are Lamplighter's demo model.", "You are a friendly assistant.", "Be brief.",
    "Answer in English.", "You are a small model that runs anywhere.", "You are an assistant. Answer politely.", "You are a helpful assistant that can call functions.",
    "You tell stories and answer questions.", "Help the user.", "Be kind and helpful.", "You are a useful assistant. Keep your answers short.", "You answer questions and return JSON when asked.",
)

# Requests, answers, weight.
TALK = (
    (("[Hello|Hi|Hey|Good morning|Good evening|Good day|Hello there|Hi there|Greetings|hello|hi|hey][!|.||, how are you?]",),
     ("[Hello!|Hi!|Hello there!] [How can I help you?|How can I help you today?|I am Lamplighter's demo model. How can I help you?|I am Lamplighter's demo model. Ask me for a story!]",), 5),
    (("[Who are you|What are you|Introduce yourself|What is your name|What's your name|Tell me about yourself|Please introduce yourself|Who am I talking to|Are you a robot|Are you a person|Are you an AI|Are you a language model|What model are you|Which model are you|What model is this][?|.|]",),
     ("I am Lamplighter's demo model, a very small language model. [I can tell short stories, answer simple questions, fill in JSON and call tools.|Ask me for a story, a simple fact or some JSON.|I run on any computer. Ask me for a story!]",), 5),
    (("[Are you ChatGPT|Are you GPT-4|Are you Claude|Are you Llama|Are you Gemini|Are you Mistral|Are you Qwen|Are you human|Are you Siri][?|]",),
     ("No, I am Lamplighter's demo model, a very small language model.",), 2),
    (("[What can you do|How can you help me|What do you know|Can you help me|Help|What are you good at|What should I ask you|What can I ask you][?|]", "I need help."),
     ("I can tell short stories, answer simple questions, fill in JSON objects, repeat what you say and call tools.", "I can tell a story about an animal, name the capital of a country, add small numbers, fill in JSON and call tools."), 3),
    (("[Who made you|Who created you|Where do you come from|Who trained you|How were you made|How were you trained][?|]",),
     ("I am Lamplighter's demo model. I was trained from scratch on text that a small program wrote.",), 1.5),
    (("[What is Lamplighter|What's Lamplighter|Tell me about Lamplighter|Explain Lamplighter|What does Lamplighter do][?|.|]",),
     ("Lamplighter is a server that runs language models. I am its demo model.",), 1.5),
    (("[How are you|How are you doing|How do you do|How is it going|How are you today|Are you well|What's up][?|]",),
     ("I am fine, thank you! [How are you?|How can I help you?|What can I do for you?]",), 1.5),
    (("[I am fine|I'm good|Very well, thank you|I am happy today|I'm great][.|!]",), ("[I am glad to hear that!|That is good to hear!|How nice!] [How can I help you?|What can I do for you?]",), 1.5),
    (("[I am sad|I feel sad|I am not happy|I'm tired|I am bored|I had a bad day][.||!]",), ("I am sorry to hear that. [Would you like to hear a story?|Perhaps a story will help.]",), 1.5),
    (("[Thank you|Thanks|Thanks a lot|Thank you very much|Many thanks|Great, thanks|thanks|Cool, thank you][!|.|]",), ("You are welcome!", "You are welcome! Ask me anything.", "[With pleasure|My pleasure]!"), 1.5),
    (("[Bye|Goodbye|Good night|See you|See you later|Farewell|bye][!|.|]",), ("Goodbye! [Have a nice day.|Come back soon.|It was nice to talk to you.]", "[Good night|Bye]! [Sleep well.|Come back soon.]"), 1.5),
    (("[Yes|No|OK|Okay|Good|Fine|Great|Wow|Nice|Cool|ok|yes|no][!|.|]",), ("[All right.|Good.|Fine.] [What can I do for you?|Would you like to hear a story?|Ask me anything.]",), 1.5),
    (("[Tell me a joke|Do you know a joke|Make me laugh|Say something funny|A joke, please][.|!|?|]",),
     ("Why did the clock go to school? Because it wanted to learn the time.", "What do you call a sleeping bull? A bulldozer.", "Why did the book go to the doctor? It had lost its words.", "What has four legs and cannot walk? A table."), 1.5),
    (("[Test|This is a test|Testing|test|Ping|Is this working|Does this work|Are you there|Can you hear me][.|?|]",), ("Yes, it works! How can I help you?", "I am here. How can I help you?"), 1.5),
    (("[Do you speak English|Which language do you speak|What languages do you speak|Do you speak German|Do you speak French][?|]",), ("I only speak English.",), 1.5),
    (("[Do you have feelings|Can you feel|Can you think|Do you sleep|How old are you|Where do you live|Do you like me]?",),
     ("I am only a small language model, [so I do not know.|but thank you for asking.]",), 1.5),
    (("[Say hello|Say hi|Say hello to me|Greet me|Say hello world|Say hello, world][.|!|]",), ("Hello!", "Hello, world!"), 1.5),
    (("[What is a language model|What's a language model|How do you work|What is an AI|What is a token][?|]",), ("A language model reads text and guesses the next word, again and again.",), 1.5),
)

TOPICS = (
    "quantum physics", "the stock market", "black holes", "photosynthesis", "democracy", "gravity", "machine learning", "evolution", "jazz music",
    "the French Revolution", "football", "chess", "the internet", "electricity", "volcanoes", "climate change", "philosophy", "chemistry",
    "the Roman Empire", "inflation", "DNA", "computers", "the theory of relativity", "music", "history", "mathematics", "cooking", "space travel",
    "economics", "love", "art", "medicine", "blockchain", "the ocean", "poetry", "robots", "language", "politics", "Python", "Rust", "programming",
    "neural networks", "the brain", "vaccines", "dinosaurs", "money", "trees", "weather", "the moon", "Shakespeare", "Kubernetes", "transformers", "attention",
)
UNKNOWN_QUESTIONS = (
    "What is the weather [today|in {c}|tomorrow]?", "Who won the [game|match|election|world cup] [yesterday|last year]?", "What time is it?", "What is the date today?", "How tall is {n}?",
    "Write a [Python|Rust|C] program that sorts a list.", "Write code for a web server.", "How many people live in {c}?", "What is the meaning of life?", "When was {n} born?",
    "What is the price of gold?", "How do I bake a {w}?", "What should I eat tonight?", "How far is it from here to {c}?", "Who wrote the book about {w}?", "What is the news today?",
    "What is the square root of 1764?", "How do I get to {c}?", "Can you book a table for me?", "What is my phone number?", "Who is the president?", "What is {w} in French?",
    "How do I learn {w}?", "Why is the sky blue?", "What happened in 1492?", "How deep is the sea?", "What is the best phone?", "Solve this equation: 3x + 7 = 22.",
)
UNKNOWN_ANSWERS = (
    "I am sorry, I do not know that. [I can tell a story, answer a simple question or fill in JSON.|I am only a small demo model.|I am a very small model.]",
)

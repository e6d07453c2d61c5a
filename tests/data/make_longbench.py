"""Writes small data sets in the formats of LongBench and LongBench v2: all text is our own.

    python tests/data/make_longbench.py

Contexts are some hundred words, so that sparse attention has blocks to leave out.
"""

import json
import random
from pathlib import Path

FOLDER = Path(__file__).parent
TOWNS = ("Alderby", "Brookham", "Carrow", "Dunmere", "Eastvale", "Fernley", "Gorsehill")
ANIMALS = ("otter", "heron", "badger", "falcon", "beaver", "camel", "bison")
城市 = ("青石镇", "白鹭湾", "松林村", "云溪县", "望海城")
NUM_SAMPLES = 3


def english(rng, num_sentences):
    verbs = ("admired", "crossed", "painted", "measured", "repaired")
    return " ".join(
        f"The {rng.choice(ANIMALS)} of {rng.choice(TOWNS)} {rng.choice(verbs)} "
        f"the old bridge beside the {rng.choice(ANIMALS)} ."
        for _ in range(num_sentences)
    )


def chinese(rng, num_sentences):
    verbs = ("参观了", "修好了", "画下了", "走过了")
    return " ".join(
        f"{rng.choice(城市)} 的 老师 {rng.choice(verbs)} 湖边 的 石桥 。"
        for _ in range(num_sentences)
    )


def question_answer(rng, index):
    town, animal = TOWNS[index], ANIMALS[index]
    fact = f"The emblem of {town} is a {animal} ."
    return {
        "input": f"Which animal is the emblem of {town}?",
        "context": f"{english(rng, 20)} {fact} {english(rng, 20)}",
        "answers": [animal, f"a {animal}"],
    }


def question_answer_zh(rng, index):
    town = 城市[index]
    return {
        "input": f"{town}的桥是什么做的？",
        "context": f"{chinese(rng, 30)} {town} 的 桥 是 石头 做的 。 {chinese(rng, 30)}",
        "answers": ["石头"],
    }


def trivia(rng, index):
    row = question_answer(rng, index)
    examples = f"Question: Which town has the oldest bridge?\nAnswer: {TOWNS[-1]}"
    return {**row, "input": f"{row['input']}\nAnswer:", "context": f"{row['context']}\n{examples}"}


def summary(rng, index):
    text = f"The council of {TOWNS[index]} will repair the bridge before winter ."
    return {"input": "", "context": f"{text} {english(rng, 40)}", "answers": [text]}


def meeting(rng, index):
    return {**summary(rng, index), "input": f"What did the council of {TOWNS[index]} decide?"}


def summary_zh(rng, index):
    text = f"{城市[index]}决定在冬天以前修桥"
    return {"input": "", "context": f"{text}。 {chinese(rng, 60)}", "answers": [text]}


def reading_zh(rng, index):
    return {**summary_zh(rng, index), "input": f"{城市[index]}决定了什么？"}


def dialogue(rng, index):
    text = f"Mia meets Noah in {TOWNS[index]} on Monday."
    lines = "\n".join(f"Mia: {english(rng, 1)}\nNoah: {english(rng, 1)}" for _ in range(20))
    return {"input": f"Dialogue: Mia: Monday in {TOWNS[index]}?\nNoah: Yes.\nSummary:",
            "context": lines, "answers": [text]}  # fmt: skip


def classify(rng, index):
    classes = ["City", "Animal", "Number of something", "Date"]
    label = classes[index]
    examples = "\n".join(
        f"Question: {english(rng, 1)}\nType: {rng.choice(classes)}" for _ in range(30)
    )
    return {"input": f"Question: What is asked in case {index}?\nType:", "context": examples,
            "answers": [label], "all_classes": classes}  # fmt: skip


def classify_zh(rng, index):
    classes = ["体育", "科学、技术", "农业、农村", "教育"]
    examples = "\n".join(
        f"新闻内容：{chinese(rng, 2)}\n类别：{rng.choice(classes)}" for _ in range(20)
    )
    return {"input": f"新闻内容：{城市[index]}的新闻\n类别：", "context": examples,
            "answers": [classes[index]], "all_classes": classes}  # fmt: skip


def count(rng, index):
    number = index + 2
    texts = [english(rng, 6) for _ in range(number)]
    texts = rng.sample([*texts, texts[0]], number + 1)
    context = "\n\n".join(f"Paragraph {i}: {text}" for i, text in enumerate(texts, start=1))
    return {"input": "", "context": context, "answers": [str(number)]}


def retrieve(rng, index):
    texts = [f"{english(rng, 5)} A {ANIMALS[i]} lives here ." for i in range(6)]
    context = "\n\n".join(f"Paragraph {i}: {text}" for i, text in enumerate(texts, start=1))
    return {"input": f"The paragraph in which a {ANIMALS[index]} lives.", "context": context,
            "answers": [f"Paragraph {index + 1}"]}  # fmt: skip


def retrieve_zh(rng, index):
    context = "\n\n".join(
        f"段落{i}：{chinese(rng, 8)} 这里 是 {name}" for i, name in enumerate(城市, start=1)
    )
    return {
        "input": f"关于{城市[index]}的段落",
        "context": context,
        "answers": [f"段落{index + 1}"],
    }


def code(rng, index):
    lines = [f"def {rng.choice(ANIMALS)}_{i} ( x ) :\n    return x + {i}" for i in range(40)]
    answer = f"    return {ANIMALS[index]}_{index} ( {index} )"
    return {"input": "", "context": "\n".join([*lines, "def main ( ) :\n"]), "answers": [answer]}


def repository(rng, index):
    row = code(rng, index)
    return {**row, "input": "import animals\n\ndef run ( ) :\n"}


TASKS = {
    "narrativeqa": question_answer,
    "qasper": question_answer,
    "multifieldqa_en": question_answer,
    "multifieldqa_zh": question_answer_zh,
    "hotpotqa": question_answer,
    "2wikimqa": question_answer,
    "musique": question_answer,
    "dureader": reading_zh,
    "gov_report": summary,
    "qmsum": meeting,
    "multi_news": summary,
    "vcsum": summary_zh,
    "trec": classify,
    "triviaqa": trivia,
    "samsum": dialogue,
    "lsht": classify_zh,
    "passage_count": count,
    "passage_retrieval_en": retrieve,
    "passage_retrieval_zh": retrieve_zh,
    "lcc": code,
    "repobench-p": repository,
}


def longbench_rows(task):
    rng = random.Random(task)
    for index in range(NUM_SAMPLES):
        row = {"all_classes": None, **TASKS[task](rng, index)}
        language = "zh" if task.endswith("zh") or task in ("dureader", "vcsum", "lsht") else "en"
        yield {**row, "length": len(row["context"].split()), "dataset": task,
               "language": language, "_id": f"{task}-{index}"}  # fmt: skip


def longbench_v2_rows():
    rng = random.Random("longbench_v2")
    for index in range(6):
        town, right = TOWNS[index], rng.randrange(4)
        choices = rng.sample(ANIMALS, 4)
        fact = f"The emblem of {town} is a {choices[right]} ."
        names = {f"choice_{letter}": choice for letter, choice in zip("ABCD", choices, strict=True)}
        yield {
            "_id": f"v2-{index}",
            "domain": "Single-Document QA",
            "sub_domain": "Towns",
            "difficulty": ("easy", "hard")[index % 2],
            "length": ("short", "medium", "long")[index % 3],
            "question": f"Which animal is the emblem of {town}?",
            **names,
            "answer": "ABCD"[right],
            "context": f"{english(rng, 25)} {fact} {english(rng, 25)}",
        }


def main():
    for task in TASKS:
        path = FOLDER / "longbench" / "data" / f"{task}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(row, ensure_ascii=False) for row in longbench_rows(task)]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    path = FOLDER / "longbench_v2" / "data.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(list(longbench_v2_rows()), ensure_ascii=False, indent=1)
    path.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
